"""The user's network and callables: built, adapted, rehearsed, scored, saved.

- `building.py`: the network built, and what models of other origin bring along
- `carried.py`: state beside the trained parameters, which rounds carry
- `denominators.py`: what a mean loss was divided by
- `export.py`: torch.export and ONNX
- `generators.py`: whose turn it is with the process's random generators: fits in threads of one driver, as of a search, share them
- `keras.py`: a Keras model as a torch module
- `lightning_module.py`: a Lightning module without a Trainer
- `lightning_optimizer.py`: its optimizer and scheduler
- `likeness.py`: what tells two programs apart that look alike by name
- `losses.py`: a batch through model and loss, with row weights
- `modes.py`: train and eval mode of all modules of a program
- `packing.py`: the user's objects on their way to replicas, without the values of the model's tensors
- `prediction.py`: a model's output as a column
- `program.py`: the user's objects, and what is asked of them
- `registry.py`: which factories a stored model may name
- `rehearsal.py`: the first rows through the model, on the driver, before anything trains
- `saving.py`: model folders: safetensors and JSON
- `scored_rows.py`: outputs and labels of all validation rows, for metrics that are functions of them
- `spectral.py`: power-iteration vectors of spectral norms, found again for averaged weights
- `validation.py`: scores of the averaged model
- `watching.py`: what training changes beside everything that rounds carry
"""
