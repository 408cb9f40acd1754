"""Folders of bytes on disk, S3 or Arrow; checkpoints that a crash leaves whole.

- `arrow.py`: a folder of any Arrow file system
- `checkpoints.py`: checkpoints that a crash leaves old or new, never in between
- `commit.py`: the commit file of one checkpoint
- `disks.py`: volumes: how much room they have, and whether they are memory
- `lease.py`: which driver may write checkpoints
- `local.py`: a folder on a mounted file system
- `manifest.py`: JSON that describes the files beside it, and its checks
- `opening.py`: which kind of folder a path or URI means
- `own_names.py`: our own classes as files name them, wherever their modules lie
- `s3.py`: a folder in S3, with an atomic create
- `state_files.py`: replica states on an executor's disk
- `store.py`: the interface of a folder, and the rule for names
"""
