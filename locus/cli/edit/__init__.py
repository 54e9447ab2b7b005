"""`locus edit` and what only it needs."""
