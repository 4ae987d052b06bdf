"""The disk of the embedded broker: what happens when it is full or read-only, and when it is not any more.

reserve     space that is released when the disk is full; its state is shared by all processes of the machine
watch       notices that the broker cannot write, and heals it
"""
