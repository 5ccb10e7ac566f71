"""A page that shows where trained networks compute in a photograph.

`server` runs it on this machine; `web` writes it as a static folder.
"""

from dynconv_jax.demo.networks import DemoNetwork, load_networks
from dynconv_jax.demo.server import Server
from dynconv_jax.demo.web import export_web

__all__ = ['DemoNetwork', 'Server', 'export_web', 'load_networks']
