"""Where distillation targets come from: ``modes.py`` opens what a recipe asks for; ``base.py`` is their contract."""
