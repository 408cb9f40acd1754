"""Everything that crosses between driver and replica, as values and as frames.

- `exchange.py`: updates through shared storage
- `messages.py`: what driver and replica tell each other in small: places, steps, the headers on the wire
- `orders.py`: what the driver asks of replicas, what a round of them gives, and a job that carries one order
- `refusals.py`: what is checked of a replica's words, and refused by name
- `tls.py`: the certificate of one run, and the socket it encrypts
- `wire.py`: frames on a socket
"""
