"""Students: small segmentation networks. One file of this folder = one family of encoders or decoders."""
