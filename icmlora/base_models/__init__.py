"""Find, load and run base models; one file per modality."""
