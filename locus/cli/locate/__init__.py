"""`locus locate` and what only it needs."""
