"""The scripts that turn datasets into shards and retrieval sets, and what they share.

In a checkout this folder stands at the top; the package has a link to it, and the wheel a copy.
"""
