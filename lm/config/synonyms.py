"""Suggestions for unknown configuration keys, from the names that other codebases use."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

# Key → names in Hugging Face, nanoGPT, MaxText, Levanter, Megatron-LM, T5X and PyTorch (last part,
# in lower case, without underscores).
NAMES = {
    "optimizer.learning_rate": "lr peaklr maxlr baselr stepsize peaklearningrate maxlearningrate "
    "baselearningrate",
    "optimizer.name": "optim optimizer opttype optimizertype opt",
    "optimizer.weight_decay": "wd decay adamweightdecay l2 weightdecayrate",
    "optimizer.clip_norm": "gradclip maxgradnorm gradientclippingthreshold clipgrad gradclipnorm "
    "gradientclipping gradientclipval clip clipgradnorm",
    "optimizer.adamw.b1": "beta1 adambeta1 adamb1 betas",
    "optimizer.adamw.b2": "beta2 adambeta2 adamb2",
    "optimizer.adamw.eps": "epsilon adamepsilon adameps",
    "optimizer.freeze": "frozen freezelayers",
    "schedule.name": "scheduler lrscheduler lrschedulertype lrschedule lrdecaystyle "
    "lrscheduletype learningrateschedule",
    "schedule.warmup_steps": "warmup warmupiters numwarmupsteps lrwarmupsteps lrwarmupiters "
    "warmupstepsfraction warmupratio warmupfraction",
    "schedule.decay_steps": "lrdecayiters lrdecaysteps learningrateschedulesteps",
    "schedule.final_ratio": "minlr minlrratio cosinelearningratefinalfraction finallr alphaf",
    "train.steps": "maxsteps numsteps maxiters trainsteps numtrainsteps totalsteps trainiters "
    "iterations niters epochs nepochs numepochs numtrainepochs trainepochs maxepochs",
    "train.microbatches": "gradientaccumulationsteps gradaccum accumulationsteps gradaccumsteps "
    "accumulategradbatches numacc nmicrobatches microbatchsize",
    "train.remat": "gradientcheckpointing rematpolicy activationcheckpointing recompute "
    "recomputegranularity checkpointactivations",
    "train.stop_at": "exitinterval stopat",
    "data.batch_size": "bs batch globalbatchsize trainbatchsize perdevicetrainbatchsize "
    "perdevicebatchsize minibatchsize",
    "data.sequence_length": "seqlen seqlength maxlen maxseqlen maxseqlength sequencelen "
    "contextlength contextlen maxtargetlength trainseqlen blocksize ctxlen nctx maxsequencelength "
    "modelmaxlength",
    "data.source": "dataset data corpus datasetname datasetpath datapath trainfile trainfiles "
    "traindata trainset traindataset files path datasets",
    "data.validation_source": "validationfile evalfile valfile validationdata evaldataset valdata "
    "validfile devfile valset evaldatasetname valdataset",
    "data.test_source": "testfile testdata testset",
    "data.validation_fraction": "valfraction validationsplitpercentage valsize valratio "
    "evalfraction testsize valsplit",
    "data.validation_seed": "splitseed evalseed valseed",
    "data.directory": "datadir",
    "data.cache_directory": "cachedir",
    "data.tokenizer": "tokenizername tokenizerpath tokenizermodel tokenizertype vocabfile vocab",
    "data.workers": "numworkers preprocessingnumworkers dataloadernumworkers nproc numproc",
    "data.field": "textcolumn textcolumnname textfield textkey",
    "data.labels": "labelnames classes label2id id2label labellist classnames",
    "data.pack": "packing packsequences",
    "model.family": "modeltype architecture arch modelfamily modelname type",
    "model.n_layers": "nlayer layers numlayers numhiddenlayers depth nblocks numblocks nlayers "
    "basenumdecoderlayers numdecoderlayers nlayersencoder numencoderlayers",
    "model.n_decoder_layers": "decoderlayers ndecoderlayers",
    "model.d_model": "hiddensize hiddendim nembd embeddim dim modeldim embeddingsize embsize emb "
    "width nhidden baseembdim embeddingdim hidden dimmodel modelsize",
    "model.n_heads": "nhead heads numheads numattentionheads numqueryheads basenumqueryheads "
    "attentionheads",
    "model.n_kv_heads": "numkeyvalueheads numkvheads nkvhead kvheads basenumkvheads numquerygroups",
    "model.head_dim": "dhead headsize dkv attentionheadsize",
    "model.d_ff": "intermediatesize ffndim nffn ffnhiddensize mlpdim basemlpdim ffdim "
    "dimfeedforward feedforwarddim ninner mlphidden dimff hiddendimff",
    "model.vocab_size": "vocabularysize nvocab paddedvocabsize",
    "model.max_length": "maxpositionembeddings npositions maxpositions maxcontext",
    "model.norm": "normalization normtype layernorm normlayer",
    "model.norm_eps": "rmsnormeps layernormeps layernormepsilon normalizationlayerepsilon lneps",
    "model.activation": "hiddenact activationfunction mlpactivations act actfn nonlinearity",
    "model.dropout": "dropoutrate residpdrop hiddendropout hiddendropoutprob pdrop dropoutprob "
    "embdpdrop drop dropoutp",
    "model.attention_dropout": "attnpdrop attentionprobsdropoutprob attndropout",
    "model.tie_embeddings": "tiewordembeddings weighttying tieweights logitsviaembedding "
    "tiedembeddings shareembeddings",
    "model.positions": "positionembedding posemb positionembeddingtype posenc positionencoding "
    "positionalencoding",
    "model.rope_theta": "ropebase rotaryembbase ropemaxtimescale ropethetabase",
    "model.bias": "usebias addbiaslinear linearbias",
    "model.attention_bias": "qkvbias",
    "model.attention": "attnimplementation attentionkernel attentiontype flashattention useflash "
    "useflashattention flashattn",
    "model.window": "slidingwindow slidingwindowsize windowsize localattentionwindow",
    "model.dtype": "precision bf16 fp16 torchdtype mixedprecision computedtype amp weightdtype",
    "model.init_std": "initializerrange initmethodstd initstddev",
    "model.n_experts": "numexperts numlocalexperts nexperts moenumexperts nroutedexperts",
    "model.experts_per_token": "numexpertspertok topkexperts moeroutertopk moetopk",
    "model.n_classes": "numlabels numclasses nlabels",
    "objective.name": "objective task loss lossfn",
    "objective.label_smoothing": "labelsmoothingfactor smoothing",
    "objective.z_loss": "zlossweight zlosscoef",
    "objective.mask_rate": "mlmprobability maskprob maskingrate maskprobability",
    "init.from": "initfrom pretrained modelnameorpath loadfrom checkpointpath initializefromhf "
    "initializefrom loadparameterspath finetunefrom resumefrom",
    "lora.rank": "lorar lorarank r",
    "lora.alpha": "loraalpha",
    "lora.targets": "targetmodules loratargets",
    "checkpoint.every_steps": "saveinterval savesteps saveevery checkpointperiod checkpointevery "
    "saveeverysteps checkpointinterval",
    "checkpoint.keep_last": "savetotallimit maxtokeep keeplastn maxcheckpoints keepcheckpoints",
    "eval.every_steps": "evalinterval evalsteps evalevery evalperiod stepspereval evalfrequency "
    "valcheckinterval",
    "eval.max_batches": "evaliters maxevalbatches limitvalbatches maxevalsteps",
    "eval.batch_size": "evalbatchsize perdeviceevalbatchsize valbatchsize",
    "log.every_steps": "loginterval loggingsteps logperiod logevery logeverynsteps",
    "log.tensorboard": "reportto tensorboarddir",
    "decode.beam_size": "numbeams beams beamwidth beam",
    "decode.max_length": "maxnewtokens maxdecodelen maxdecodelength",
    "decode.length_penalty": "alpha lengthalpha",
    "decode.repetition_penalty": "reppenalty",
    "decode.banned_tokens": "suppresstokens beginsuppresstokens badwordsids",
    "parallel.mesh.tensor": "tensorparallelsize tp icitensorparallelism tensormodelparallelsize "
    "modelparallelsize tensorparallel tensorparallelism mp",
    "parallel.mesh.fsdp": "icifsdpparallelism dataparallelshard fsdpsize zero zerostage",
    "parallel.mesh.stage": "pipelineparallelsize pp pipelinemodelparallelsize "
    "icipipelineparallelism pipelineparallel",
    "parallel.mesh.expert": "ep expertparallelsize iciexpertparallelism expertmodelparallelsize",
    "parallel.mesh.context": "cp contextparallelsize icicontextparallelism sequenceparallelsize",
    "parallel.mesh.data": "dp dataparallelsize icidataparallelism",
    "parallel.mesh.slice": "dcndataparallelism nslices numslices",
    "seed": "randomseed manualseed rngseed dataseed initseed",
}
_OURS = {name: path for path, names in NAMES.items() for name in names.split()}


def suggested_keys(path: str, known: Collection[str]) -> list[str]:
    """Return suggestions for an unknown key, most likely first; may be empty.

    Keys with the same last part come first, then keys that have this name in other codebases, then
    the most similar name.
    """
    plain = [part.lower().replace("-", "_") for part in path.split(".")]
    last = plain[-1]
    same = [key for key in known if key.rsplit(".", 1)[-1] == last]
    if same:
        return same[:3]
    compact = re.sub(r"[^a-z0-9]", "", last)
    found = [key for key in known if re.sub(r"[^a-z0-9]", "", key.rsplit(".", 1)[-1]) == compact]
    if compact in _OURS and _OURS[compact] in known:
        return [_OURS[compact]]
    if found:
        return [key for key in found if key.split(".")[0] == plain[0]] or found[:3]
    close = difflib.get_close_matches(".".join(plain), known, n=1, cutoff=0.6)
    return close or [
        key
        for name in difflib.get_close_matches(compact, _OURS, n=1, cutoff=0.75)
        for key in known
        if key == _OURS[name]
    ]
