"""Recipes to start from: one YAML file each, named in a recipe by ``preset``."""
