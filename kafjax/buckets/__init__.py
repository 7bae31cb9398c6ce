"""Buckets, such as `s3://` and `gs://`, through fsspec: each folder has a copy on this machine.

    KAFJAX_CACHE/buckets/<scheme>/<bucket>/<key>    the copy, which all other code reads and writes
    KAFJAX_CACHE/known/<scheme>/<bucket>/<key>      what was last fetched or sent under that key
    KAFJAX_CACHE/records/                           records of datasets, up to KAFJAX_CACHE_GB

`fetch` makes the copy of a folder like the bucket's, `send` the bucket's like the copy. An object
of a bucket is written whole or not at all; of a folder with a marker (a checkpoint, a dataset) the
marker is written last and deleted first, so no part of one is taken for the whole. Records are not
fetched but read by ranges. Importing this imports no library of any cloud.
"""

from kafjax._lazy import public

__all__, __getattr__ = public(
    __name__,
    {
        ".mirror": ("fetch", "send"),
        ".places": ("copy_of", "is_url", "show", "url_of"),
        ".store": ("BucketError",),
    },
)
