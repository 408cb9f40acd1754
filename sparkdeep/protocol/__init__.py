"""Everything that crosses between driver and replica, as values and as frames.

- `exchange.py`: updates through shared storage
- `messages.py`: the typed headers that cross the wire
- `orders.py`: what crosses where no connection does
- `plans.py`: what a replica is told of itself
- `refusals.py`: what the driver refuses from a replica, by name
- `tls.py`: the certificate of one run, and the socket it encrypts
- `values.py`: what a round starts from and what it gives
- `wire.py`: frames on a socket
"""
