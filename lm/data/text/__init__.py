"""Sources of documents: the standard library, text and JSON files, TensorFlow Datasets."""
