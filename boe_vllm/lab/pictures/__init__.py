"""Pictures of runs and of single requests: `boe-vllm plot` and `boe-vllm watch`.

plot        the command: figures of a run of `boe-vllm eval`
results     the folder of such a run, read
curves      score against network function evaluations, and against rows
fronts      share against passes and rows of finished cells, with the Pareto fronts
bars        scores and times of variants
figure      what all figures share: colours, sizes, files without dates

watch       the command: one request under several policies
denoiser    a checkpoint in this process, without an engine
recorder    a denoising loop that notes what happens on its canvas
influence   what revealing a position does to the entropies of the others, from the gradient
trajectory  the notes, as JSON
timeline    a trajectory as a figure: positions and steps
page        a trajectory as a self-contained HTML page
terminal    a trajectory in the terminal
"""
