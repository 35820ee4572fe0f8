"""Students as files that run without the trainer: ONNX with all that a user of the file has to know."""
