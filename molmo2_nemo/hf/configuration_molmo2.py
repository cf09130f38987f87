"""transformers' Molmo2 configuration that also answers to the names of the checkpoints on the Hub.

An export holds a copy of this file as configuration_molmo2.py: a server that is told to trust it (vLLM's
--trust-remote-code) gets the names that its own Molmo2 reads, such as `config.vit_config.image_num_pos` and
`config.adapter_config.vit_layers`. Plain transformers does not run it. It needs transformers 5.20 or newer and nothing
else (tried with 5.20.2 and 5.23.0).
"""

from transformers.models.molmo2 import configuration_molmo2 as native


class Molmo2Config(native.Molmo2Config):
    attribute_map = {**native.Molmo2Config.attribute_map, "vit_config": "vision_config"}

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        vit = self.vision_config
        vit.image_default_input_size, vit.image_patch_size = vit.image_size, vit.patch_size
        vit.image_num_pos = vit.num_position_embeddings
        self.adapter_config.vit_layers = self.adapter_config.vision_feature_layer
        self.text_config.rope_theta = self.text_config.rope_parameters["rope_theta"]
