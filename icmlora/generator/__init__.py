"""The generator: a conditional variational autoencoder over adapter tokens, and the codec that uses it.

config, sensitivity, scales   the settings, the weights of the channels, and the tables that numbers are coded under
initial_a/                    the A that training began with
network/                      adapters as tokens, the network over them, and its loss: the length of a code in bits
files/                        the bytes of a generator
codec/                        adapters <-> codes
"""
