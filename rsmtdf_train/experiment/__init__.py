"""Several runs that belong together: arms over paired seeds, their comparison, and the accuracy benchmark."""
