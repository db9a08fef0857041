"""Base models: finding, loading and running them; one file per modality."""
