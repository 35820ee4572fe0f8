"""rsmtdf_train: teach small segmentation networks from labels, unlabelled tiles and cached teacher features.

Flow: store → sample → batch → student → objective → step → checkpoint → metrics. Holds no teacher.
"""
