"""Commands beside training and evaluation: speed of a machine, report on a folder of images, pictures, SLURM jobs.

May import everything but __main__; nothing imports it but __main__.
"""
