"""Programs whose CUDA memory is vattn's, for the GPU tests of the allocator.

Each runs in a process of its own, since a global allocator comes before CUDA is used and stays.
They assert; what they print, if anything, is one line of JSON. With the device ``cpu`` those that
have a meaning there run on CPU tensors through tests/torch_bridge: a rehearsal of the same code.
"""
