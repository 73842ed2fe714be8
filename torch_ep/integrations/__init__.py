"""torch_ep in other frameworks, one module per framework. Import the module: none is imported by torch_ep itself."""

__all__: list[str] = []
