"""Texts of like length go together: a batch is padded to its longest text, and padding is work for nothing.

In the model-config.yaml of a model:

    batching: length-buckets
"""

from wsgi_ts.plugins import plugin

#: A batch costs as much as its longest text times their number; more than this (in bytes) is two batches.
MOST_PADDED = 64 * 1024


@plugin("batching", name="length-buckets")
class LengthBuckets:
    def key(self, head):
        return head.body_bytes.bit_length()

    def cost(self, head):
        return 2 ** head.body_bytes.bit_length()

    def admit(self, batch_cost, batch_n, cost):
        return batch_cost + cost <= MOST_PADDED
