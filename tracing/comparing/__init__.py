"""Several localizers on the same facts: how far their masks agree."""
