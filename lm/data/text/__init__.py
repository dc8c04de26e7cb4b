"""Document sources: standard library, files of several formats, data sets."""
