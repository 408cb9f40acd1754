"""petastorm's datasets, read without petastorm or through it.

- `codecs.py`: petastorm's codecs, a column at a time
- `nested.py`: numpy values as nested Arrow columns
- `pickles.py`: a pickle read as data; nothing in it is run
- `reading.py`: one replica's row groups through petastorm's own reader
- `unischema.py`: a petastorm schema as plain descriptions
"""
