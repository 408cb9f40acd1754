"""Folders of bytes on disk, S3 or Arrow; checkpoints that a crash leaves whole.

- `checkpoints.py`: checkpoints that a crash leaves old or new, never in between
- `disks.py`: volumes: how much room they have; replica states on an executor's disk
- `lease.py`: which driver may write checkpoints
- `local.py`: a folder on a mounted file system
- `manifest.py`: JSON that describes the files beside it, the commit file of a checkpoint too
- `opening.py`: which kind of folder a path or URI means; a folder of any Arrow file system
- `own_names.py`: our own classes as files name them, wherever their modules lie
- `s3.py`: a folder in S3, with an atomic create
- `store.py`: the interface of a folder, and the rule for names
"""
