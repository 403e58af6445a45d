"""What runs a study: a graph of hashed jobs, their records, workers that claim what is missing."""
