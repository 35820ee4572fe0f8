"""Builds whose store lies in an object store: a lease, records in a local folder, shards put where they stay.

Operations are numbered in ``FORMAT.md``, section 6; why: ``docs/decisions/0033-object-store-builds.md``.
"""
