"""Everything that crosses between driver and replica, as values and as frames.

- `bodies.py`: an update's body as it comes in
- `exchange.py`: updates through shared storage
- `messages.py`: the typed headers that cross the wire
- `orders.py`: what the driver asks of a replica, and a job that carries one order
- `plans.py`: what a replica is told of itself
- `refusals.py`: what the driver refuses from a replica, by name
- `tls.py`: the certificate of one run, and the socket it encrypts
- `values.py`: what a round starts from and what it gives
- `wire.py`: frames on a socket
"""
