"""Runs slime's own reader and writer of disk deltas, as the other side of the tests of the backend `dir`.

    python slime_peer.py SLIME pull    SOURCE_DIR BASE LOCAL VERSION [VERSION ...]
    python slime_peer.py SLIME publish BASE DELTA_DIR ENCODING CHECKSUM CHECKPOINT [CHECKPOINT ...]

SLIME is a folder with the sources of https://github.com/THUDM/slime. `pull` runs the reader that slime patches into SGLang (it is
taken out of the patch), once for each version. `publish` runs the updater of the trainer: BASE is the checkpoint that it starts from, and
each CHECKPOINT becomes a version. Ray, Megatron and the engines are replaced by nothing: what is run is diffing, encoding and
writing. Needs numpy, zstandard, xxhash, blake3 and safetensors; `publish` needs torch as well.
"""

import importlib.util
import pathlib
import sys
import tempfile
import types

PATCH = "docker/patch/latest/sglang-pull_weights.patch"
READER = "python/sglang/srt/weight_sync/local_checkpoint.py"
WRITER = "slime/backends/megatron_utils/update_weight/update_weight_from_disk_delta.py"


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def reader(slime):
    """The file that the patch adds."""
    lines, within = [], False
    for line in (slime / PATCH).read_text().splitlines():
        if line.startswith("diff --git"):
            within = line.endswith(" b/" + READER)
        elif within and line.startswith("+") and not line.startswith("+++"):
            lines.append(line[1:])
    if not lines:
        sys.exit(f"{slime / PATCH} does not add {READER}")
    path = pathlib.Path(tempfile.mkdtemp()) / "local_checkpoint.py"
    path.write_text("\n".join(lines) + "\n")
    return load("local_checkpoint", path)


def pull(slime, source, base, local, *versions):
    module = reader(slime)
    for version in versions:
        module.pull(local, base, source, int(version))


def stub(name, **attributes):
    module = types.ModuleType(name)
    module.__path__ = []
    module.__dict__.update(attributes)
    sys.modules[name] = module
    return module


def writer(slime):
    """The updater's module, with stubs for what it does not need here."""

    class Distributed:
        pass

    class Stream:
        def synchronize(self):
            pass

    import torch.distributed as dist

    stub("ray", get=lambda pulls: pulls)
    stub("ray.actor", ActorHandle=object)
    mpu = types.SimpleNamespace()
    stub("megatron")
    stub("megatron.core", mpu=mpu)
    stub("slime")
    accelerator = stub("slime.utils.accelerator", current_stream=Stream)
    stub("slime.utils", accelerator=accelerator)
    stub("slime.utils.distributed_utils", get_gloo_group=lambda: dist.group.WORLD)
    load("slime.utils.disk_delta", slime / "slime/utils/disk_delta.py")
    stub("peer")
    stub("peer.update_weight_from_distributed", UpdateWeightFromDistributed=Distributed)
    return load("peer.update_weight_from_disk_delta", slime / WRITER)


def publish(slime, base, delta_dir, encoding, checksum, *checkpoints):
    import torch.distributed as dist
    from safetensors import safe_open

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    module = writer(slime)

    def tensors(folder):
        for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)

    class Updater(module.UpdateWeightFromDiskDelta):
        def __init__(self):
            self.args = types.SimpleNamespace(hf_checkpoint=base)
            self.delta_dir = delta_dir
            self.delta_encoding = encoding
            self.checksum_algorithm = checksum
            self._snapshot = {}
            self._baseline_captured = False
            self._post_write_hook = None
            self._is_pp_src_rank = True
            self.rollout_engines = []
            self.weight_version = 0
            self.present = base

        def _iter_non_expert_chunks(self):
            yield tensors(self.present)

        def _iter_expert_chunks(self):
            return iter(())

        def _record_metrics(self):
            pass

    updater = Updater()
    updater.update_weights()
    for checkpoint in checkpoints:
        updater.present = checkpoint
        updater.update_weights()
    dist.destroy_process_group()


if __name__ == "__main__":
    slime, mode, *rest = sys.argv[1:]
    {"pull": pull, "publish": publish}[mode](pathlib.Path(slime), *rest)
