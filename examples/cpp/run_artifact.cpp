// Runs an artifact from C++, through AOTInductor's own loader: no Python, no moec.
//
//     moec inspect out.moec --extract out
//     run_artifact out/cpu/model.pt2 1,2,3 4,5,6
//
// Every argument after the package is a sequence of token ids, all of one length. Prints the most likely next token of
// each sequence, and with MOEC_OUTPUT=file in the environment writes the logits there as floats.
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>

int main(int argc, char** argv) {
    if (argc < 3) {
        std::cerr << "usage: run_artifact model.pt2 1,2,3 [4,5,6 ...]\n";
        return 2;
    }
    std::vector<int64_t> tokens;
    for (int i = 2; i < argc; i++) {
        std::stringstream text(argv[i]);
        for (std::string word; std::getline(text, word, ',');) tokens.push_back(std::stoll(word));
    }
    const int64_t sequences = argc - 2;
    const at::Tensor input = at::tensor(tokens, at::kLong).reshape({sequences, -1});

    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    const at::Tensor logits = model.run({input}).at(0).to(at::kFloat).contiguous();

    const at::Tensor next = logits.select(1, -1).argmax(-1);
    for (int64_t i = 0; i < sequences; i++) std::cout << next[i].item<int64_t>() << "\n";
    if (const char* path = std::getenv("MOEC_OUTPUT"))
        std::ofstream(path, std::ios::binary).write((const char*)logits.data_ptr<float>(), logits.numel() * sizeof(float));
}
