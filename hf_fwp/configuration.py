from .options import MixerOptions
