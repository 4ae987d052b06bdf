"""Who may do what at the broker, and its configuration.

roles          the permission table: what each role may publish, subscribe to and ask of JetStream
credentials    a file for each role, with its password
secret_files   files that only their owner may read
configuration  the text of a nats-server's configuration
"""
