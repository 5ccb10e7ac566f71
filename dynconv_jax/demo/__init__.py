"""Web page that shows where trained networks compute in an image.

`server` serves it from this machine; `web` writes it as a static folder.
"""

from dynconv_jax.demo.networks import DemoNetwork, load_networks
from dynconv_jax.demo.server import Server
from dynconv_jax.demo.web import export_web

__all__ = ['DemoNetwork', 'Server', 'export_web', 'load_networks']
