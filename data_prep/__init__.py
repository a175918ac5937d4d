"""Scripts that turn datasets into shards and retrieval sets, and their shared code.

In a checkout, the package has a link to this folder; the wheel has a copy.
"""
