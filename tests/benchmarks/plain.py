"""MAE and DINO as one writes them first: what sslvit's speed is measured against.

Written from the two papers the way that the published training scripts work: all patches embedded and all predicted,
attention as two matrix products with a softmax between, one softmax for each pair of crops, gradients clipped tensor by
tensor with a look at each norm on the host, the teacher moved by a Python loop, a stock AdamW, PIL images augmented one
by one in the loader. Parameter names are those of timm and the published checkpoints, so that both sides can start from
the same weights.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import transforms

IMAGENET = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def precision(device: torch.device, bf16: bool) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (d // self.heads) ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), MLP(width)
        self.drop_path = drop_path

    def drop(self, x: Tensor) -> Tensor:
        """Stochastic depth: the branch is computed for all and zeroed for some."""
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x / keep * (keep + torch.rand(len(x), 1, 1, device=x.device)).floor()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """A plain ViT with a class token."""

    def __init__(self, size: int, patch: int, width: int, depth: int, heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.patch, self.grid = patch, size // patch
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, width))
        rates = [i * drop_path / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def positions(self, images: Tensor) -> Tensor:
        """Resized by bicubic interpolation for crops of another size, at each forward."""
        grid = images.shape[-1] // self.patch
        if grid == self.grid:
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        square = patches.reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        factor = (grid + 0.1) / self.grid  # as published: "a small number to avoid floating point error"
        square = F.interpolate(square, scale_factor=(factor, factor), mode="bicubic")
        return torch.cat([cls, square.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class MAE(ViT):
    def __init__(
        self, size: int, patch: int, width: int, depth: int, heads: int, decoder: tuple[int, int, int], ratio: float
    ) -> None:
        """decoder: width, depth, heads."""
        super().__init__(size, patch, width, depth, heads)
        self.ratio = ratio
        self.decoder_embed = nn.Linear(width, decoder[0])
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder[0]))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, decoder[0]))
        self.decoder_blocks = nn.ModuleList(Block(decoder[0], decoder[2]) for _ in range(decoder[1]))
        self.decoder_norm = nn.LayerNorm(decoder[0], eps=1e-6)
        self.decoder_pred = nn.Linear(decoder[0], patch**2 * 3)
        self.pos_embed.requires_grad_(False)
        self.decoder_pos_embed.requires_grad_(False)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """[B, 3, H, W], [B, N] uniform noise that decides what is masked -> the loss."""
        b, n = noise.shape
        kept = int(n * (1 - self.ratio))
        shuffle = noise.argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        x = x.gather(1, shuffle[:, :kept, None].expand(-1, -1, x.shape[2]))
        mask = torch.ones(b, n, device=x.device)
        mask[:, :kept] = 0
        mask = mask.gather(1, restore)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(b, -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        filled = torch.cat([x[:, 1:], self.mask_token.expand(b, n - kept, -1).to(x.dtype)], dim=1)
        filled = filled.gather(1, restore[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], filled], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        prediction = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        p = self.patch
        target = images.reshape(b, 3, self.grid, p, self.grid, p).permute(0, 2, 4, 3, 5, 1).reshape(b, n, p * p * 3)
        target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        loss = ((prediction - target) ** 2).mean(dim=-1)
        return (loss * mask).sum() / mask.sum()


class Head(nn.Module):
    def __init__(self, width: int, prototypes: int, hidden: int, bottleneck: int) -> None:
        super().__init__()
        layers = [nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        self.last_layer = nn.Module()
        self.last_layer.weight_v = nn.Parameter(torch.randn(prototypes, bottleneck))
        self.last_layer.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.mlp(x), dim=-1)
        layer = self.last_layer
        return F.linear(x, layer.weight_v * (layer.weight_g / layer.weight_v.norm(dim=1, keepdim=True)))


class Network(nn.Module):
    def __init__(self, backbone: ViT, head: Head) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops: list[Tensor]) -> Tensor:
        """Crops of one resolution, which come one after another, pass the backbone together."""
        features, start = [], 0
        while start < len(crops):
            end = start
            while end < len(crops) and crops[end].shape == crops[start].shape:
                end += 1
            features.append(self.backbone(torch.cat(crops[start:end])))
            start = end
        return self.head(torch.cat(features))


class DINOLoss(nn.Module):
    def __init__(self, prototypes: int, student_temp: float = 0.1, teacher_temp: float = 0.04) -> None:
        super().__init__()
        self.student_temp, self.teacher_temp = student_temp, teacher_temp
        self.register_buffer("center", torch.zeros(1, prototypes))

    def forward(self, student: Tensor, teacher: Tensor, views: int) -> Tensor:
        student_crops = (student / self.student_temp).chunk(views)
        teacher_crops = ((teacher - self.center) / self.teacher_temp).softmax(dim=-1).detach().chunk(2)
        total, pairs = 0, 0
        for t, target in enumerate(teacher_crops):
            for s, logits in enumerate(student_crops):
                if s == t:
                    continue
                total = total + torch.sum(-target * F.log_softmax(logits, dim=-1), dim=-1).mean()
                pairs += 1
        self.update_center(teacher)
        return total / pairs

    @torch.no_grad()
    def update_center(self, teacher: Tensor) -> None:
        self.center = self.center * 0.9 + teacher.sum(dim=0, keepdim=True) / len(teacher) * 0.1


def groups(module: nn.Module) -> list[dict]:
    """With weight decay, and biases and norms without."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim > 1 and not name.endswith(".bias")]
    return [{"params": decayed}, {"params": [p for name, p in named if p.ndim == 1], "weight_decay": 0.0}]


class MAETraining:
    """One step of MAE's training script."""

    def __init__(self, model: MAE, lr: float, bf16: bool) -> None:
        self.model, self.lr, self.bf16 = model, lr, bf16
        self.device = model.cls_token.device
        self.optimizer = torch.optim.AdamW(groups(model), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)

    def step(self, images: Tensor, noise: Tensor) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        with precision(self.device, self.bf16):
            loss = self.model(images, noise)
        value = loss.item()
        assert math.isfinite(value)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value


class DINOTraining:
    """One step of DINO's training script."""

    def __init__(
        self, student: Network, teacher: Network, prototypes: int, lr: float, momentum: float, freeze: bool, bf16: bool
    ) -> None:
        self.student, self.teacher, self.lr, self.momentum = student, teacher, lr, momentum
        self.freeze, self.bf16 = freeze, bf16
        teacher.load_state_dict(student.state_dict())
        teacher.requires_grad_(False)
        self.device = next(student.parameters()).device
        self.loss = DINOLoss(prototypes).to(self.device)
        self.optimizer = torch.optim.AdamW(groups(student), lr=lr, betas=(0.9, 0.999), weight_decay=0.04)

    def step(self, crops: list[Tensor]) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        with precision(self.device, self.bf16):
            teacher = self.teacher(crops[:2])
            student = self.student(crops)
            loss = self.loss(student, teacher, len(crops))
        value = loss.item()
        assert math.isfinite(value)
        self.optimizer.zero_grad()
        loss.backward()
        for _, p in self.student.named_parameters():
            if p.grad is not None:
                norm = p.grad.norm(2)
                norm.item()
                scale = 3.0 / (norm + 1e-6)
                if scale < 1:
                    p.grad.mul_(scale)
        if self.freeze:
            for p in self.student.head.last_layer.parameters():
                p.grad = None
        self.optimizer.step()
        with torch.no_grad():
            for q, k in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                k.mul_(self.momentum).add_((1 - self.momentum) * q)
        return value


def mae_transform(size: int) -> Callable:
    """A PIL image -> [3, size, size]."""
    crop = transforms.RandomResizedCrop(size, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), IMAGENET])


def dino_transform(size: int, local_size: int, locals_: int) -> Callable:
    """A PIL image -> a list of 2 + locals_ crops."""
    jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)
    colours = [transforms.RandomHorizontalFlip(), jitter, transforms.RandomGrayscale(0.2)]

    def crop(size: int, scale: tuple[float, float], blur: float, solarize: float) -> Callable:
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale, interpolation=transforms.InterpolationMode.BICUBIC),
                *colours,
                transforms.RandomApply([transforms.GaussianBlur(13, (0.1, 2.0))], blur),
                transforms.RandomSolarize(128, solarize),
                transforms.ToTensor(),
                IMAGENET,
            ]
        )

    kinds = [crop(size, (0.4, 1.0), 1.0, 0.0), crop(size, (0.4, 1.0), 0.1, 0.2)]
    kinds += [crop(local_size, (0.05, 0.4), 0.5, 0.0)] * locals_
    return lambda image: [kind(image) for kind in kinds]
