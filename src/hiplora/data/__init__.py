"""Data files: row formats and readers, prompts, tokens and labels, texts to measure on."""
