"""What a patch is: sites, runs, corruption, metrics, and the plain engine."""
