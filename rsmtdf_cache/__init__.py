"""rsmtdf_cache: run frozen foundation models over tiles once, keep their dense features in sharded Zarr v3.

Flow: tiles → views → teachers → codec → shards → commit. Works alone, without the trainer.
"""
