"""The label of pixels that nobody annotated: they count in no loss, sample or score."""

IGNORED = -1  # in batches and volumes
STORED = 255  # in records, whose labels are uint8
