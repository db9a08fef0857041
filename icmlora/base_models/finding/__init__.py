"""Locate and identify base models on this machine."""
