"""Scenes to a dataset without a copy: which windows there are, which of them show and label something, who has them."""
