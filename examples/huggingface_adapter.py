"""A HuggingFace model folder (`config.json` beside the weights) whose model gives images back, such as a masked ViT.

Config:

    remote_eval:
      adapter: huggingface_adapter:HuggingFaceAdapter
      data: {images: /path/on/the/node}
      user_config: {model: /path/on/the/node/model-folder}

The node needs `transformers`; the checkpoint is the folder's weights. Here only its `config.json` is read: no code from
it runs, and nothing is downloaded.
"""

# ruff: noqa: ARG002 - the signatures are the protocol's, whether all of it is needed or not

from __future__ import annotations

from pathlib import Path

from image_autoencoder_adapter import Images

from remote_payload.reconstruct.protocol import AdapterBase, Kind, Modality

# Transformers 5 has other names in its ViT than in the files that it writes; 4 has the files'.
RENAMED = {
    ".encoder.layer.": ".layers.",
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
}


def model_config(config):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(config.user["model"], trust_remote_code=False, local_files_only=True)


class HuggingFaceAdapter(AdapterBase):
    data_names = ("images",)

    def build_model(self, config):
        from transformers import AutoModelForMaskedImageModeling

        model = AutoModelForMaskedImageModeling.from_config(model_config(config), trust_remote_code=False)
        self.names = set(model.state_dict())
        return model

    def map_state_dict(self, names):
        mapping = {}
        for name in names:
            new = name
            for old, renamed in RENAMED.items():
                new = new.replace(old, renamed)
            mapping[name] = new if new in self.names else name
        return mapping

    def modalities(self, data, config):
        model = model_config(config)
        shape = (model.num_channels, model.image_size, model.image_size)
        return [Modality("image", Kind.IMAGE, "CHW", shape, value_range=(0.0, 1.0), unit="intensity")]

    def samples(self, split, data, config):
        return Images(Path(data["images"]) / f"{split}.npy")

    def train_reference(self, data, config):
        return self.samples("train", data, config)

    def predict(self, model, batch):
        # Without a mask all patches are seen. The head has no sigmoid.
        return {"image": model(batch["image"]).reconstruction.clamp(0, 1)}
