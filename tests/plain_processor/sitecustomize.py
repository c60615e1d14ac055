"""On the path of every Python that a test starts with `--plain-processor`: bf16 isn't among what the processor can."""

import importlib.util
import sys


class WithoutBf16:
    """Changes `torch.cpu` once somebody imports it: some programs are tested not to import torch."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_change(module):
            load(module)
            module.get_capabilities = dict

        spec.loader.exec_module = load_and_change
        return spec


sys.meta_path.insert(0, WithoutBf16())
