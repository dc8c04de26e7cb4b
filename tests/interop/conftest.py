"""Folders of small random models of `transformers`."""

import pytest


@pytest.fixture(scope="session")
def make_theirs(tmp_path_factory):
    """Make a transformers model and its folder; deterministic by name."""
    import hf_models

    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = hf_models.build(*hf_models.KINDS[name])
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return make
