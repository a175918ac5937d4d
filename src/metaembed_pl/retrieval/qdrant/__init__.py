"""A store past one machine: the same items in Qdrant, found by the same calls.

address: where a collection is    layout: how items lie in it    requests: a cascade as one request
collection: its calls    push: a store into one    store: searching it    sizing: what it will cost
"""
