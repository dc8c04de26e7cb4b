"""Speech recordings: reading them, their features, and sources of transcribed recordings."""
