"""mesh-transformer-jax checkpoint -> HF folder: python recipes/import_mesh.py source=DIR output_dir=DIR"""

from dataclasses import asdict
from pathlib import Path

from gptj_train import GPTJConfig
from gptj_train.config import ImportMeshConfig
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.export.from_mesh_jax import MeshCheckpoint
from gptj_train.launch.recipe import recipe
from gptj_train.training.model_files import ModelFiles
from gptj_train.weights.hf_writer import DTYPES


@recipe(ImportMeshConfig, primary="import_mesh", one_process=True)
def main(cfg: ImportMeshConfig) -> None:
    checkpoint = MeshCheckpoint(cfg.source, GPTJConfig(**asdict(cfg.model)))
    tokenizer = Tokenizer.load(cfg.tokenizer) if cfg.tokenizer is not None else None
    if tokenizer is not None:
        tokenizer.check_fits(checkpoint.config.vocab_size)
    checkpoint.save_pretrained(cfg.output_dir, DTYPES[cfg.dtype])
    if tokenizer is not None:
        ModelFiles(checkpoint.config, "GPTJForCausalLM", tokenizer).save(Path(cfg.output_dir), DTYPES[cfg.dtype])
    count = sum(shape.numel() for shape in checkpoint.shapes.values())
    moments = " and Adam's moments" if checkpoint.is_full else ""
    print(f"{count:,} parameters{moments} of step {checkpoint.step:,} in {cfg.output_dir}")


if __name__ == "__main__":
    main()
