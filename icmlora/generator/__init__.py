"""The generator: a conditional variational autoencoder over adapter tokens, and the codec that uses it.

cvae, objective              the network, and its loss: the length of a code in bits
tokens, sensitivity          adapters as weighted singular vectors
quantizer, scales            tokens as integers, and the tables they are coded under
codec, encoding              adapters <-> codes; code, packing, entropy_coding and container make the bytes
relaxed                      a code that gradient steps can refine
versions, file, network_file, differences                    the generator's own bytes
initial_a/                   the A that training began with
"""
