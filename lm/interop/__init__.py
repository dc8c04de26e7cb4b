"""Interoperability: Hugging Face model folders, llama2.c files, and their conversion to runs.

Reading order: `tensor_mapping` (a tensor and its parameters), `family` (an architecture), one
of `gpt2`, `llama`, `gemma`, `bert`, `t5`, then `model_folder` and `import_export`. Public:
`huggingface.load`, `huggingface.save`, `import_export.import_run`, `import_export.export_run`.
"""
