"""Judges of images that know nothing of NVG: metrics over arrays, and small classifiers."""
